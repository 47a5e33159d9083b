"""Facts to train on and to ask: real ones, in several wordings."""
