"""Pictures through the vision tower: together, a few per step, and none twice."""
