"""Models behind one interface: `loading.load_model` picks the class by the checkpoint's `config.json`."""
