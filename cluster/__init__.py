"""Where the pipeline runs: Ray actor pools for data, Ray Train gangs with DeepSpeed for training."""
