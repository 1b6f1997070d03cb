"""One download of everything that a hostile server can answer, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stages.download import DownloadConfig
from stages.manifest import Manifest
from tests.conftest import free_port
from tests.stages.download_data import rows_of, samples_of, source_of, table_of
from tests.stages.hostile_server import PNG, serve, special_file

TOP = Path(__file__).parents[2]
TIMEOUT_S, RETRIES, NUM_COPIES = 1.0, 1, 40

GOOD: dict[str, str | None] = {
    "/image": None,
    "/image/ünïcode/猫.jpg?q=é&r=%20 x": None,
    "/image/" + "a" * 1993: None,
    "/image?" + "q=" * 1000: None,
    "/chunked": None,
    "/understated": None,
    "/closes-quietly": None,
    "/recovers?1,500": None,
    "/recovers/b?1,503": None,
    "/busy-once?1": None,
    "/redirect?/image/elsewhere": None,
    "/special/gif.gif": None,
    "/special/cmyk.jpg": None,
    "/special/deep.png": None,
    "/special/glass.png": None,
    "/special/glass.png?again": None,
    "/opt-out?otherbot:+noai": None,
} | {f"/image/copy/{row}": None for row in range(NUM_COPIES)}
BAD: dict[str, str | None] = {
    "/status/404": "http_404",
    "/status/410": "http_410",
    "/status/500": "http_500",
    "/status/999": "http_999",
    "/status/204": "http_204",
    "/status/500?86400": "http_500",
    "/status/502?" + "9" * 400: "http_502",
    "/status/504?Fri,%2031%20Dec%209999%2023:59:59%20GMT": "http_504",
    "/status/500?Fri,%2031%20Dec%2099999999999999999999%2023:59:59%20GMT": "http_500",
    "/status/503?Fri,%2031%20Dec%202030%2023:59:59%20%2B99999999999999999": "http_503",
    "/status/408?86400": "http_408",
    "/status/425?86400": "http_425",
    "/busy?0": "http_429",
    "/slow-drip": "timeout",
    "/dribbled-headers": "timeout",
    "/silent": "timeout",
    "/endless": "too_large",
    "/announced": "too_large",
    "/negative-chunk": "too_large",
    "/truncated": "truncated",
    "/truncated-chunk": "truncated",
    "/reset": "truncated",
    "/short-length": "decode",
    "/empty": "empty",
    "/garbage": "connect",
    "/hang-up": "connect",
    "/loop": "redirects",
    "/redirect?http://127.0.0.2:80/": "blocked_address",
    "/redirect?http://[::ffff:10.0.0.1]/": "blocked_address",
    "/redirect?file:///etc/passwd": "scheme",
    "/redirect?http://[half": "invalid_url",
    "/opt-out?noai": "opt_out",
    "/special/html.jpg": "decode",
    "/special/svg.jpg": "decode",
    "/special/cut.jpg": "decode",
    "/special/bomb.png": "too_many_pixels",
}
ELSEWHERE: dict[str | None, str | None] = {
    None: "invalid_url",
    "": "invalid_url",
    "no url at all": "invalid_url",
    "file:///etc/passwd": "scheme",
    "data:image/png;base64,AAAA": "scheme",
    "http://127.0.0.2/": "blocked_address",
    "http://169.254.169.254/latest/meta-data": "blocked_address",
    "http://name.invalid/a.jpg": "dns",
}


def download_in_process(tmp_path: Path, config: DownloadConfig, inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    job = tmp_path / "job"
    job.write_bytes(pickle.dumps((str(tmp_path), config, inputs)))
    command = [sys.executable, "-m", "tests.stages.download_in_process", str(job)]
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    done = subprocess.run(command, cwd=TOP, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warnings, no traces"
    return dict(json.loads(done.stdout))


@pytest.fixture
def config() -> DownloadConfig:
    return DownloadConfig(
        timeout_s=TIMEOUT_S,
        retries=RETRIES,
        backoff_s=0.05,
        num_threads=16,
        connections_per_host=8,
        circuit_breaker_failures=0,  # one server plays all parts; the breaker has its own test
        max_bytes=2_000_000,
        max_redirects=3,
        allowed_networks=("127.0.0.1/32",),
        image_format="png",
        image_quality=1,
    )


@pytest.mark.slow
def test_every_answer_ends_in_its_reason_at_bounded_cost(tmp_path: Path, config: DownloadConfig) -> None:
    dead = f"http://127.0.0.1:{free_port()}/image"
    for name in ("gif", "cmyk", "deep", "glass", "bomb"):
        special_file(name)  # drawn before the clock runs
    with serve() as server:
        expected: dict[str | None, str | None] = {server.url + path: reason for path, reason in (GOOD | BAD).items()}
        expected |= {dead: "connect", server.url.replace("http:", "https:") + "/image": "tls"}
        expected |= ELSEWHERE
        urls = list(expected)
        answer = download_in_process(tmp_path, config, {"source": source_of(tmp_path, rows_of(urls))})
        requests = Counter(server.paths)
    manifest = Manifest.read_uri(str(tmp_path), answer["manifest"])

    table = table_of(manifest)
    assert [row["url"] for row in table] == urls
    assert {row["url"]: row["reason"] for row in table} == expected
    reasons = Counter(reason for reason in expected.values() if reason is not None)
    assert manifest.dropped == dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    assert manifest.num_in == len(urls) == manifest.num_kept + sum(reasons.values())

    samples = {sample.metadata["url"]: sample for sample in samples_of(manifest)}
    assert set(samples) == {url for url, reason in expected.items() if reason is None}
    for url, sample in samples.items():
        name = url.rpartition("/special/")[2].partition(".")[0] if "/special/" in url else ""
        served = special_file(name) if name else PNG
        assert sample.metadata["sha256"] == hashlib.sha256(served).hexdigest()
    copies = [sample.image for url, sample in samples.items() if "/copy/" in url]
    assert len(copies) == NUM_COPIES and len(set(copies)) == 1

    print(answer)
    assert answer["peak_mib"] < 1024 and not answer["torch"]
    # Four rows hold a place until their deadline, at each attempt; all else is a matter of moments and of the pause of
    # one second that /busy-once asks for.
    assert answer["wall_s"] < 4 * (1 + RETRIES) * TIMEOUT_S + 10
    retried = [path for path, count in requests.items() if count > 1 and path != "/loop"]
    assert {path.partition("?")[0].split("/")[1] for path in retried} == {
        "status", "busy", "busy-once", "recovers", "slow-drip", "dribbled-headers", "silent", "truncated",
        "truncated-chunk", "reset", "garbage", "hang-up",
    }  # fmt: skip
    assert requests["/status/500"] == 2 and requests["/status/404"] == requests["/status/410"] == 1
    metrics = manifest.records[0].metrics
    num_never_asked = sum(reason in ("invalid_url", "scheme") for reason in ELSEWHERE.values())
    assert metrics["attempts"] - metrics["retries"] == len(urls) - num_never_asked
