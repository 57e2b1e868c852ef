"""Raw measurement on the target: kernels, timers, latency tables and whole-model runs."""
