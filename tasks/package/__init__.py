"""Package: the best variant that passed, as bundles that runtimes take as they are. One file a target."""
