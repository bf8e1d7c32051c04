"""How a trained network leaves: programs and models that run without bnjax."""
