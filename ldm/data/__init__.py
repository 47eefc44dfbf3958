"""Package data: the merges of CLIP's vocabulary, with the licence they come under."""
