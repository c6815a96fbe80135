{{/* What a schema can't say, all of it in one message. */}}
{{- define "taskqueue.checks" -}}
{{- $wrong := list -}}
{{- if not (include "taskqueue.pools" . | fromJson) -}}
{{- $wrong = append $wrong "workers: there must be a pool" -}}
{{- end -}}
{{- range $name, $pool := (include "taskqueue.pools" . | fromJson) -}}
{{- if not $pool.queues -}}
{{- $wrong = append $wrong (printf "workers.%s.queues: name at least one queue" $name) -}}
{{- end -}}
{{- if and (ne $pool.autoscaling.by "none") (gt $pool.autoscaling.minReplicas $pool.autoscaling.maxReplicas) -}}
{{- $wrong = append $wrong (printf "workers.%s.autoscaling: minReplicas is more than maxReplicas" $name) -}}
{{- end -}}
{{- end -}}
{{- with .Values.api.autoscaling -}}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) -}}
{{- $wrong = append $wrong "api.autoscaling: minReplicas is more than maxReplicas" -}}
{{- end -}}
{{- end -}}
{{- range $one := list (list "redis" "externalRedis") (list "postgresql" "externalDatabase") -}}
{{- $own := index $.Values (index $one 0) -}}
{{- $external := index $.Values (index $one 1) -}}
{{- $given := or $external.url $external.existingSecret -}}
{{- if and $own.enabled $given -}}
{{- $wrong = append $wrong (printf "%s.enabled: must be false when %s is set" (index $one 0) (index $one 1)) -}}
{{- else if not (or $own.enabled $given) -}}
{{- $wrong = append $wrong (printf "%s: set url or existingSecret, or %s.enabled" (index $one 1) (index $one 0)) -}}
{{- else if and $external.url $external.existingSecret -}}
{{- $wrong = append $wrong (printf "%s: set either url or existingSecret" (index $one 1)) -}}
{{- end -}}
{{- end -}}
{{- if and (include "taskqueue.kedaPools" .) .Values.externalRedis.existingSecret (not .Values.externalRedis.keda.address) -}}
{{- $wrong = append $wrong "externalRedis.keda.address: KEDA needs it, since it takes no URL" -}}
{{- end -}}
{{- with .Values.ingress -}}
{{- if and .enabled (not .hosts) -}}
{{- $wrong = append $wrong "ingress.hosts: name at least one" -}}
{{- end -}}
{{- end -}}
{{- with .Values.httpRoute -}}
{{- if and .enabled (not .parentRefs) -}}
{{- $wrong = append $wrong "httpRoute.parentRefs: name at least one Gateway" -}}
{{- end -}}
{{- end -}}
{{- with .Values.metrics -}}
{{- if and .podMonitor.enabled .serviceMonitor.enabled -}}
{{- $wrong = append $wrong "metrics: every pod would be scraped twice with both podMonitor and serviceMonitor" -}}
{{- end -}}
{{- if and .prometheusRule.enabled (not .prometheusRule.groups) (not ($.Files.Glob "rules/*.yaml")) -}}
{{- $wrong = append $wrong "metrics.prometheusRule.groups: there is none" -}}
{{- end -}}
{{- end -}}
{{- $needed := include "taskqueue.connections" . | int -}}
{{- $offered := ternary .Values.postgresql.maxConnections .Values.externalDatabase.maxConnections .Values.postgresql.enabled -}}
{{- if and $offered (gt $needed (int $offered)) -}}
{{- $place := ternary "postgresql" "externalDatabase" .Values.postgresql.enabled -}}
{{- $wrong = append $wrong (printf "%s.maxConnections: %d do not do, these pods may open %d; raise it, have fewer of them, or put PgBouncer between (see the README)" $place (int $offered) $needed) -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "\n\nThese values are wrong:\n- %s\n" (join "\n- " $wrong)) -}}
{{- end -}}
{{- end -}}

{{/* How many connections to Postgres may be open at once. In a rollout each workload has one pod more. An API may
     open 10, a relay 8, a worker one for each child (whose tasks report progress, or submit others) and five for
     its keeper, and KEDA 2 for a pool; 5 are for migrations and people. */}}
{{- define "taskqueue.connections" -}}
{{- $apis := include "taskqueue.mostApis" . | int -}}
{{- $sum := add 5 (mul 10 (add 1 $apis)) (mul 8 (add 1 .Values.relay.replicas)) -}}
{{- range (include "taskqueue.pools" . | fromJson) -}}
{{- $workers := include "taskqueue.mostWorkers" . | int -}}
{{- $sum = add $sum (mul (add 1 $workers) (add 5 .concurrency)) (ternary 2 0 (eq .autoscaling.by "keda")) -}}
{{- end -}}
{{- $sum -}}
{{- end -}}
