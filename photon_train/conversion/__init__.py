"""Dense checkpoints to PHOTON checkpoints: source -> presets -> plan -> apply -> calibrate."""
