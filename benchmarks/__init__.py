"""What flylora costs: run `python -m benchmarks NAME --help`."""
