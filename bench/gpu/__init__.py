"""`make gpu`: tests, benchmark and launch choices on the GPU that is there, and one report. See docs/gpu.md."""
