"""Every named method: a torch-free declaration of parts, with its source."""
