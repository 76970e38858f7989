"""How a run goes: set up, stepped, saved, on one process or many."""
