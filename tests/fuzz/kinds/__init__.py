"""One file for each kind of input: ``draw(random, sound)`` makes a case that damages it."""
