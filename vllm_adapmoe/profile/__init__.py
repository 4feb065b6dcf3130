"""ModelProfile: what calibration learnt of one model, and what follows from it."""
