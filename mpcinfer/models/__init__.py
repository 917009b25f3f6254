"""From checkpoint files to torch modules; knows nothing of MPC."""
