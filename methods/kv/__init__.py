"""Key/value caches: how attention's past is stored, in fewer bits than the model computes in."""
