"""The stage machine: train, grow, train on, until the last model of a schedule has its steps."""
