"""From a torch module to a Program, and running a Program over shares."""
