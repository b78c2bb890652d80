#!/bin/sh
# driver | executor: what Spark's Kubernetes backend calls an image with.
cd /tmp # spark-submit copies the job's jar to where it is
options=$(env | grep '^SPARK_JAVA_OPT_' | sort -t_ -k4 -n | sed 's/[^=]*=//' | tr '\n' ' ')
case "$1" in
driver)
	shift
	exec /opt/spark/bin/spark-submit --conf "spark.driver.bindAddress=$SPARK_DRIVER_BIND_ADDRESS" \
		--conf "spark.executorEnv.SPARK_DRIVER_POD_IP=$SPARK_DRIVER_BIND_ADDRESS" --deploy-mode client "$@"
	;;
executor)
	exec /opt/jdk/bin/java $options -Xms$SPARK_EXECUTOR_MEMORY -Xmx$SPARK_EXECUTOR_MEMORY \
		-cp "$SPARK_EXTRA_CLASSPATH:/opt/spark/jars/*:/opt/spark/conf" org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend \
		--driver-url $SPARK_DRIVER_URL --executor-id $SPARK_EXECUTOR_ID --cores $SPARK_EXECUTOR_CORES --app-id $SPARK_APPLICATION_ID \
		--hostname $SPARK_EXECUTOR_POD_IP --resourceProfileId $SPARK_RESOURCE_PROFILE_ID --podName $SPARK_EXECUTOR_POD_NAME
	;;
*) exec "$@" ;;
esac
