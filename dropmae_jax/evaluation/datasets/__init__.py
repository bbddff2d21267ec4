"""The clips and measures of zero-shot benchmarks."""
