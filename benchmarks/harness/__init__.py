"""How a case is prepared, checked, timed and compared."""
