"""Deployments on a Prefect server: what runs the pipeline by the clock, when lists change, and by hand.

Everything is an upsert by name: the same command again changes what is there and makes nothing twice.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Literal
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, WorkPool
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.events.actions import CallWebhook, RunDeployment, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.utilities.schema_tools.validation import ValidationError, validate

from flows import parameters
from flows.deployed import FLOW_NAME, LISTS_CHANGED, WATCH_NAME, lists_resource
from flows.prefect_server import ServerError
from stages import storage
from stages.code_version import code_version
from stages.config import Config, to_values
from stages.errors import ConfigError, first_line
from stages.machines import KubernetesConfig
from stages.orchestration import PrefectConfig

_STATES = {
    "completed": "Completed",
    "failed": "Failed",
    "crashed": "Crashed",
    "timed_out": "TimedOut",
    "cancelled": "Cancelled",
    "refused": "Refused",
}
_SUBJECT = "unclip {name}: {{{{ flow_run.state.name }}}}"
_BODY = "{{ flow_run.name }}: {{ flow_run.state.name }}. {{ flow_run.state.message }}\n{{ flow_run|ui_url }}"
_PAYLOAD = (
    '{"deployment": {{ deployment.name|tojson }}, "flow_run": {{ flow_run.name|tojson }}, '
    '"state": {{ flow_run.state.name|tojson }}, "message": {{ flow_run.state.message|tojson }}, '
    '"url": {{ flow_run|ui_url|tojson }}}'
)
_BASE_TEMPLATES = {"process": ("prefect", "process"), "kubernetes": ("prefect-kubernetes", "kubernetes")}


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What stands on the server.

    Attributes:
        name: of the deployment, ``flow/name``.
        work: what its runs do: ``run`` or ``retrain``.
        version: of the code that deployed it (``stages/code_version.py``).
        pool: its work pool.
        automations: names of the automations that belong to it.
        watch: name of the deployment that watches the lists, if there is one.
    """

    name: str
    work: str
    version: str
    pool: str
    automations: tuple[str, ...] = ()
    watch: str | None = None


def portable(config: Config) -> Config:
    """Return a config that means the same in any folder."""
    source = replace(config.source, lists=tuple(storage.absolute(uri) for uri in config.source.lists))
    return replace(config, root=storage.absolute(config.root), source=source)


def deploy(config: Config, name: str, work: Literal["run", "retrain"], **defaults: Any) -> Deployed:
    """Register a config with the server that Prefect is set to.

    Args:
        config: what to run.
        name: of the deployment.
        work: which of the flows of ``flows/deployed.py`` its runs are.
        defaults: further parameters of its runs, such as ``until``.

    Raises:
        ConfigError: if the server refuses a setting.
        ServerError: if it refuses anything else.
    """
    config = portable(config)
    chosen = config.prefect
    if chosen.watch_lists_s is not None and config.source.kind != "urls":
        raise ConfigError("prefect.watch_lists_s: source.kind is 'shapes', which has no lists; set it to null")
    schedules = list(_schedules(chosen))
    with get_client(sync_client=True) as client:
        try:
            pool = _pool(client, config)
            variables = job_variables(config, pool)
            main = _register(
                client,
                name,
                FLOW_NAME,
                f"flows.deployed.{work}",
                config,
                variables,
                schedules=schedules,
                schema=parameters.run_schema() if work == "run" else parameters.retrain_schema(),
                concurrency=chosen.concurrency,
                when_busy=chosen.when_busy,
                defaults=defaults,
            )
            watcher = _register_watch(client, name, config, variables)
            automations = list(_automations(client, name, config, main))
            kept = tuple(_upsert(client, automation) for automation in automations)
            _drop(client, {_lists_name(name), _ends_name(name)} - set(kept))
        except PrefectHTTPStatusError as error:
            detail = first_line(error) if error.response is None else error.response.text[:500]
            raise ServerError(f"the Prefect server refuses the deployment {name}: {detail}") from error
    return Deployed(
        name=f"{FLOW_NAME}/{name}", work=work, version=code_version(), pool=pool.name, automations=kept, watch=watcher
    )


def _register(
    client: SyncPrefectClient,
    name: str,
    flow_name: str,
    entrypoint: str,
    config: Config,
    variables: Mapping[str, Any],
    *,
    schedules: list[DeploymentScheduleCreate],
    schema: Mapping[str, Any],
    concurrency: int | None,
    when_busy: Literal["queue", "skip"],
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> UUID:
    strategy = ConcurrencyLimitStrategy.ENQUEUE if when_busy == "queue" else ConcurrencyLimitStrategy.CANCEL_NEW
    return client.create_deployment(
        flow_id=client.create_flow_from_name(flow_name),
        name=name,
        version=code_version(),
        description=f"The unCLIP pipeline on `{config.root}`.",
        tags=["unclip"],
        schedules=schedules,
        concurrency_limit=concurrency,
        concurrency_options=ConcurrencyOptions(collision_strategy=strategy),
        parameters={**defaults, "config": to_values(config), "name": name},
        parameter_openapi_schema=dict(schema),
        enforce_parameter_schema=True,
        work_pool_name=config.prefect.pool,
        job_variables=dict(variables),
        entrypoint=entrypoint,
        pull_steps=[],
    )


def _register_watch(client: SyncPrefectClient, name: str, config: Config, variables: Mapping[str, Any]) -> str | None:
    """Register what looks at the lists, or take it away where the config wants it no more."""
    interval_s = config.prefect.watch_lists_s
    if interval_s is None:
        try:
            found = client.read_deployment_by_name(f"{WATCH_NAME}/{name}")
        except ObjectNotFound:
            return None
        client.delete_deployment(found.id)
        return None
    schedule = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(seconds=interval_s)), active=True)
    _register(
        client,
        name,
        WATCH_NAME,
        "flows.deployed.watch",
        config,
        variables,
        schedules=[schedule],
        schema=parameters.watch_schema(),
        concurrency=1,
        when_busy="skip",  # the next look sees what this one would have
    )
    return f"{WATCH_NAME}/{name}"


def _schedules(config: PrefectConfig) -> Iterator[DeploymentScheduleCreate]:
    if config.cron is not None:
        try:
            schedule = CronSchedule(cron=config.cron, timezone=config.timezone)
        except ValueError:
            raise ConfigError(
                f"prefect.cron: '{config.cron}' is no time table; write minute, hour, day, month, weekday: 0 3 * * 1"
            ) from None
        yield DeploymentScheduleCreate(schedule=schedule, active=True)
    if config.interval_s is not None:
        every = timedelta(seconds=config.interval_s)
        yield DeploymentScheduleCreate(schedule=IntervalSchedule(interval=every, timezone=config.timezone), active=True)


# ---- work pools -----------------------------------------------------------------------------------------------------


def _pool(client: SyncPrefectClient, config: Config) -> WorkPool:
    """Return the work pool, made with Prefect's own template if there is none.

    Raises:
        ConfigError: if there is one that cannot do what the config wants.
    """
    wanted = config.prefect
    try:
        found = client.read_work_pool(wanted.pool)
    except ObjectNotFound:
        template = base_template(client, wanted.pool_kind)
        if wanted.pool_kind == "kubernetes":
            template = with_store(template, config.kubernetes, config.root)
        return client.create_work_pool(
            WorkPoolCreate(
                name=wanted.pool,
                type=wanted.pool_kind,
                base_job_template=template,
                concurrency_limit=wanted.pool_limit,
                description="Runs of the unCLIP pipeline.",
            )
        )
    if found.type != wanted.pool_kind:
        raise ConfigError(
            f"prefect.pool: '{wanted.pool}' is a {found.type} pool, but prefect.pool_kind is {wanted.pool_kind}; name "
            "another pool, or write that kind"
        )
    if found.type == "kubernetes":
        template = found.base_job_template
        if with_store(template, config.kubernetes, config.root) != template:
            raise ConfigError(
                f"prefect.pool: pods of '{wanted.pool}' would lack kubernetes.secrets or kubernetes.store_claim, which "
                "job templates get when their pool is made; name another pool, or add them to its template"
            )
    return found


def with_store(template: Mapping[str, Any], config: KubernetesConfig, root: str) -> dict[str, Any]:
    """Add to the job template of a Kubernetes pool what its pods need to reach the store: secrets, and the claim.

    Args:
        template: base job template; it is left alone. What it has already is not added again.
        config: names both.
        root: where the claim is mounted.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(template))
    pod = changed["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    container = pod["containers"][0]

    def add(owner: dict[str, Any], name: str, item: dict[str, Any]) -> None:
        items = owner.setdefault(name, [])
        if item not in items:
            items.append(item)

    for secret in config.secrets:
        add(container, "envFrom", {"secretRef": {"name": secret}})
    if config.store_claim is not None:
        add(pod, "volumes", {"name": "store", "persistentVolumeClaim": {"claimName": config.store_claim}})
        add(container, "volumeMounts", {"name": "store", "mountPath": root})
    return changed


def base_template(client: SyncPrefectClient, kind: str) -> dict[str, Any]:
    """Return the base job template that Prefect publishes for a kind of work pool."""
    package, name = _BASE_TEMPLATES[kind]
    metadata = client.read_worker_metadata()
    return dict(metadata[package][name]["default_base_job_configuration"])


def job_variables(config: Config, pool: WorkPool) -> dict[str, Any]:
    """Return what runs of the deployment give to the template of their pool.

    Raises:
        ConfigError: if the template does not know a variable, or not with such a value.
    """
    made = _for_kubernetes(config.kubernetes) if config.prefect.pool_kind == "kubernetes" else _for_processes()
    variables = {**made, **config.prefect.job_variables}
    schema = pool.base_job_template.get("variables", {})
    if unknown := sorted(set(variables) - set(schema.get("properties", {}))):
        raise ConfigError(
            f"prefect.job_variables: '{unknown[0]}' is no variable of the pool '{pool.name}', which has "
            f"{', '.join(schema.get('properties', {}))}"
        )
    try:
        validate(variables, schema, raise_on_error=True, preprocess=False, ignore_required=True)
    except ValidationError as error:
        raise ConfigError(f"prefect.job_variables: {error}") from None
    return variables


def _for_processes() -> dict[str, Any]:
    """A command of our own: Prefect's would get signals with all of its children, which ends Ray under a training."""
    return {"command": f"{shlex.quote(sys.executable)} -m prefect.engine"}


def _for_kubernetes(config: KubernetesConfig) -> dict[str, Any]:
    """The pod of a run drives; the shards and ranks are done where ``cluster.address`` or ``cluster.submit`` says."""
    return {
        "image": config.image,
        "namespace": config.namespace,
        "service_account_name": config.service_account,
        "finished_job_ttl": config.keep_finished_s,
        "cpu_request": str(config.head.num_cpus),
        "memory_request": f"{config.head.memory_gib}Gi",
        "memory_limit": f"{config.head.memory_gib}Gi",
    }


# ---- automations ----------------------------------------------------------------------------------------------------


def _lists_name(name: str) -> str:
    return f"{FLOW_NAME}/{name}: new lists"


def _ends_name(name: str) -> str:
    return f"{FLOW_NAME}/{name}: ends of runs"


def _automations(client: SyncPrefectClient, name: str, config: Config, main: UUID) -> Iterator[AutomationCore]:
    if config.prefect.watch_lists_s is not None:
        resource = lists_resource(config.root, name)["prefect.resource.id"]
        yield AutomationCore(
            name=_lists_name(name),
            description="A run as soon as a URL list is new or longer.",
            trigger=_when({LISTS_CHANGED}, match={"prefect.resource.id": resource}),
            actions=[RunDeployment(source="selected", deployment_id=main, parameters=None, job_variables=None)],
        )
    if config.prefect.notify:
        yield AutomationCore(
            name=_ends_name(name),
            description="Tells how runs end.",
            trigger=_when(
                {f"prefect.flow-run.{_STATES[end]}" for end in config.prefect.notify_on},
                match={"prefect.resource.id": "prefect.flow-run.*"},
                match_related={
                    "prefect.resource.role": "deployment",
                    "prefect.resource.id": f"prefect.deployment.{main}",
                },
            ),
            actions=[_notice(client, name, block) for block in config.prefect.notify],
        )


def _when(events: set[str], **matched: Any) -> EventTrigger:
    each = {"prefect.resource.id"}
    return EventTrigger(
        expect=events, posture=Posture.Reactive, threshold=1, within=timedelta(0), for_each=each, **matched
    )


def _notice(client: SyncPrefectClient, name: str, block: str) -> CallWebhook | SendNotification:
    kind, _, title = block.partition("/")
    try:
        found = client.read_block_document_by_name(title, kind, include_secrets=False)
    except ObjectNotFound:
        raise ConfigError(
            f"prefect.notify: the server has no block '{block}'; make it on its page Blocks, or with `prefect block "
            f"create {kind}`"
        ) from None
    if kind == "webhook":
        return CallWebhook(block_document_id=found.id, payload=_PAYLOAD)
    return SendNotification(block_document_id=found.id, subject=_SUBJECT.format(name=name), body=_BODY)


def _upsert(client: SyncPrefectClient, automation: AutomationCore) -> str:
    found = client.read_automations_by_name(automation.name)
    if found:
        client.update_automation(found[0].id, automation)
    else:
        client.create_automation(automation)
    return automation.name


def _drop(client: SyncPrefectClient, names: set[str]) -> None:
    """Take away what an earlier deployment of this name had and this one has not."""
    for name in names:
        for automation in client.read_automations_by_name(name):
            client.delete_automation(automation.id)
