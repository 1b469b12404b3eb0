"""Auto-tuning: search strategies, the tuner and the store of what it found. It never knows an op."""
