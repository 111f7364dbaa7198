"""Models behind one interface: `load_model` picks the class by the checkpoint's `config.json`."""
