"""What the pipeline does: one file per stage, and the contracts they share (storage, manifests, config).

Nothing here knows about Ray or Prefect: every stage runs in one ordinary process.
"""
