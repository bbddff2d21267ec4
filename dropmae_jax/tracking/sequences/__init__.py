"""The sequences of tracking benchmarks, and the files of results that their toolkits read."""
