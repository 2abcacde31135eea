"""Lossy pruning: which experts of a learned router can go, by what calibration text makes of them."""
