"""What a guided sampler can be pulled towards: a colour, a sentence, a layout, or a loss of one's own."""
