"""Native PySpark, DataFrames on local[2]: ``python on_pyspark.py JOB FOLDER TARGET``."""

import sys

from pyspark.sql import Column, SparkSession
from pyspark.sql import functions as f


def measures(job: str) -> list[Column]:
    value = f.col("value")
    base = [
        f.count("*").alias("n"),
        f.sum(value).alias("total"),
        f.avg(value).alias("mean"),
        f.min(value).alias("least"),
        f.max(value).alias("most"),
    ]
    if job == "base":
        return base
    p95 = f.percentile_approx(value, 0.95, 200).alias("p95")
    return [*base, p95, f.approx_count_distinct("user", 0.02).alias("users")]


def main(job: str, folder: str, target: str) -> None:
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.driver.memory", "4g")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.shuffle.partitions", "4")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    rows = spark.read.parquet(folder)
    views = rows.groupBy("key", f.date_trunc("hour", "ts").alias("hour")).agg(*measures(job))
    views.write.mode("overwrite").parquet(target)
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
