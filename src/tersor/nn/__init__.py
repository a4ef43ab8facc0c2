"""What knows a model's insides: layers, their stand-ins, and how models of a family are called."""
