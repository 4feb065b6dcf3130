"""ModelProfile: calibration results of one model, and the thresholds and expected loads derived from them."""
