"""Benchmarks: the losses against other projects' functions and against bare GEMMs. Nothing here is imported by the packages."""
