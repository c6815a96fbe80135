"""What things cost: measurements, apart from the tests. Ratios within one run are what counts."""
