"""What is measured of images and runs: diversity, statistics with intervals, Pareto fronts."""
