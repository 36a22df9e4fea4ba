"""Ray: actors, pools and the controller. The composition root, where parts are given to one another."""
