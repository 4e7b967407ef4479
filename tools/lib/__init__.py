"""What the studies and benchmarks beside this folder share; the library imports none of it."""
