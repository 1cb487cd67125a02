"""Virtual time: how long local steps, messages and collectives take, without taking that long."""
