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
{{- if .Values.postgresql.enabled -}}
{{- $needed := include "taskqueue.connections" . | int -}}
{{- $offered := .Values.postgresql.maxConnections | int -}}
{{- if gt $needed $offered -}}
{{- $wrong = append $wrong (printf "postgresql.maxConnections: %d do not do, these pods may open %d; raise it, or have fewer of them" $offered $needed) -}}
{{- end -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "\n\nThese values are wrong:\n- %s\n" (join "\n- " $wrong)) -}}
{{- end -}}
{{- end -}}

{{/* How many connections to Postgres may be open at once. In a rollout each workload has one pod more. An API may
     open 10, a relay 8, a worker one for each child and one for its keeper; 5 are for migrations and people. */}}
{{- define "taskqueue.connections" -}}
{{- $sum := add 5 (mul 10 (add 1 .Values.api.replicas)) (mul 8 (add 1 .Values.relay.replicas)) -}}
{{- range (include "taskqueue.pools" . | fromJson) -}}
{{- $sum = add $sum (mul (add 1 .replicas) (add 1 .concurrency)) -}}
{{- end -}}
{{- $sum -}}
{{- end -}}
