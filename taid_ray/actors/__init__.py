"""Ray actors and the clients that hide them. All of `.remote` and `ray.get` lives here."""
