"""The over-optimization lab: at equal KL, does an arm raise gold? Arms, gates, schedule and results."""
