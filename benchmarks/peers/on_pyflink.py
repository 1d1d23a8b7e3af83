"""PyFlink, SQL in batch mode on an embedded cluster of two slots: ``python on_pyflink.py JOB FOLDER TARGET``.

SQL is its fastest way: rows never reach Python. JARS (in the environment) are the Parquet format and Hadoop's client.
"""

import os
import sys
from pathlib import Path

from pyflink.table import EnvironmentSettings, TableEnvironment

BASE = "count(*) AS n, sum(`value`) AS total, avg(`value`) AS mean, min(`value`) AS least, max(`value`) AS most"
SKETCH = f"{BASE}, percentile(`value`, 0.95) AS p95, count(distinct `user`) AS users"
COLUMNS = "key STRING, `hour` TIMESTAMP(3), n BIGINT, total DOUBLE, mean DOUBLE, least DOUBLE, most DOUBLE"


def main(job: str, folder: str, target: str) -> None:
    jars = sorted(Path(os.environ["JARS"]).absolute().glob("*.jar"))
    environment = TableEnvironment.create(EnvironmentSettings.in_batch_mode())
    settings = environment.get_config()
    settings.set("pipeline.jars", ";".join(jar.as_uri() for jar in jars))
    settings.set("parallelism.default", "2")
    settings.set("table.local-time-zone", "UTC")
    for option in ("taskmanager.memory.managed.size", "taskmanager.memory.task.heap.size"):
        settings.set(option, "1g")
    environment.execute_sql(f"""
        CREATE TABLE readings (key STRING, ts TIMESTAMP(6), `value` DOUBLE, `user` BIGINT)
        WITH ('connector' = 'filesystem', 'path' = '{Path(folder).absolute().as_uri()}', 'format' = 'parquet')
    """)
    columns = COLUMNS if job == "base" else f"{COLUMNS}, p95 DOUBLE, users BIGINT"
    environment.execute_sql(f"""
        CREATE TABLE hourly ({columns})
        WITH ('connector' = 'filesystem', 'path' = '{Path(target).absolute().as_uri()}', 'format' = 'parquet')
    """)
    environment.execute_sql(f"""
        INSERT INTO hourly SELECT key, CAST(floor(ts TO HOUR) AS TIMESTAMP(3)), {BASE if job == "base" else SKETCH}
        FROM readings GROUP BY key, floor(ts TO HOUR)
    """).wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
