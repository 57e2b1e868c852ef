"""The compression library: policies, models, formats, calibration and every method. Needs torch, numpy and pandas alone."""
