"""The release recipe, `python -m dlmone_fast.release`: from data to an evaluated model folder."""
