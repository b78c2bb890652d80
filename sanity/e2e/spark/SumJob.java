import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import org.apache.spark.scheduler.SparkListener;
import org.apache.spark.scheduler.SparkListenerTaskEnd;
import org.apache.spark.sql.Dataset;
import org.apache.spark.sql.Row;
import org.apache.spark.sql.SparkSession;

/**
 * Sums TPC-H's lineitem as often as it is told to: SumJob FORMAT PATH PASSES. Prints a line per group and pass
 * ("SUM pass flag status quantity rows"), and at the end how many tasks each executor ended and how many failed.
 */
public class SumJob {
  public static void main(String[] args) throws Exception {
    SparkSession spark = SparkSession.builder().appName("sum").getOrCreate();
    Map<String, Integer> tasks = new TreeMap<>();
    int[] failed = {0};
    spark.sparkContext().addSparkListener(new SparkListener() {
      @Override public void onTaskEnd(SparkListenerTaskEnd e) {
        synchronized (tasks) {
          if (!e.taskInfo().successful()) failed[0]++;
          else tasks.merge(e.taskInfo().host(), 1, Integer::sum);
        }
      }
    });
    // Both executors have to be there, or the first has read everything before the second comes.
    while (spark.sparkContext().statusTracker().getExecutorInfos().length < 3) Thread.sleep(200);
    for (int pass = 0; pass < Integer.parseInt(args[2]); pass++) {
      System.out.println("PASS " + pass + " begins");
      Dataset<Row> table = args[0].equals("csv")
          ? spark.read().option("header", true).option("inferSchema", false).csv(args[1]) : spark.read().parquet(args[1]);
      table.createOrReplaceTempView("lineitem");
      List<Row> rows = spark.sql("select l_returnflag, l_linestatus, sum(cast(l_quantity as decimal(15,2))), count(*) from lineitem"
          + " group by 1, 2 order by 1, 2").collectAsList();
      for (Row r : rows) System.out.println("SUM " + pass + " " + r.get(0) + " " + r.get(1) + " " + r.get(2) + " " + r.get(3));
    }
    spark.stop(); // delivers the last events
    synchronized (tasks) {
      tasks.forEach((host, n) -> System.out.println("TASKS " + host + " " + n));
      System.out.println("FAILED " + failed[0]);
    }
  }
}
