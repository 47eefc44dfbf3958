"""Data sets under CompVis's names; and the merges of CLIP's vocabulary, with the licence they come under."""
