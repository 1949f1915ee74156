-- Run once, on an empty volume. Prefect's database is the one that the image makes itself; two migrators in one
-- database would write the same version table.
CREATE DATABASE mlflow;
