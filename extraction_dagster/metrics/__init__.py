"""The figures that operators watch and are alerted by: taken at little cost, and shown as Prometheus reads them."""
