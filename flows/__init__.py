"""When the pipeline runs: the Prefect flow, the command line, the report."""
