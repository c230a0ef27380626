"""How good samples are: features of images, and figures that compare sets of them. Knows no job and no storage."""
