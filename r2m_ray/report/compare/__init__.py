"""What finished runs show about over-optimization: curves, gold at matched KL, intervals, tables."""
