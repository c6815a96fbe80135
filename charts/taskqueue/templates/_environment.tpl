{{/* Where Postgres is for the migration: never behind PgBouncer. */}}
{{- define "taskqueue.directEnv" -}}
{{- if and (not .Values.postgresql.enabled) .Values.externalDatabase.existingSecret .Values.externalDatabase.directKey -}}
{{- $values := deepCopy .Values -}}
{{- $_ := set $values.externalDatabase "key" .Values.externalDatabase.directKey -}}
{{- include "taskqueue.connectionEnv" (merge (dict "Values" $values) (omit . "Values")) -}}
{{- else -}}
{{- include "taskqueue.connectionEnv" . -}}
{{- end -}}
{{- end -}}

{{/* Where Postgres is. The kubelet puts the password into the URL, so that it stands in no manifest. */}}
{{- define "taskqueue.databaseEnv" -}}
{{- if .Values.postgresql.enabled }}
{{- with .Subcharts.postgresql }}
- name: POSTGRES_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ include "postgresql.secretName" . }}, key: {{ .Values.auth.key }}}
- name: DATABASE_URL
  value: postgresql://{{ .Values.auth.username }}:$(POSTGRES_PASSWORD)@{{ include "postgresql.fullname" . }}:5432/{{ .Values.auth.database }}
{{- end }}
{{- else }}
- name: DATABASE_URL
  valueFrom:
    secretKeyRef:
      {{- with .Values.externalDatabase }}
      name: {{ default (printf "%s-external" (include "taskqueue.fullname" $)) .existingSecret }}
      key: {{ if .existingSecret }}{{ .key }}{{ else }}database-url{{ end }}
      {{- end }}
{{- end }}
{{- end -}}

{{/* Where Redis is, likewise. */}}
{{- define "taskqueue.redisEnv" -}}
{{- if .Values.redis.enabled }}
{{- with .Subcharts.redis }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ include "redis.secretName" . }}, key: {{ .Values.auth.key }}}
- name: REDIS_URL
  value: redis://:$(REDIS_PASSWORD)@{{ include "redis.fullname" . }}:6379/0
{{- end }}
{{- else }}
- name: REDIS_URL
  valueFrom:
    secretKeyRef:
      {{- with .Values.externalRedis }}
      name: {{ default (printf "%s-external" (include "taskqueue.fullname" $)) .existingSecret }}
      key: {{ if .existingSecret }}{{ .key }}{{ else }}redis-url{{ end }}
      {{- end }}
{{- end }}
{{- end -}}

{{/* What every process needs to start. */}}
{{- define "taskqueue.connectionEnv" -}}
{{- include "taskqueue.databaseEnv" . }}
{{- include "taskqueue.redisEnv" . }}
- name: TASKQUEUE_AUTH_MODE
  value: {{ .Values.config.authMode | quote }}
- name: TASKQUEUE_LOG_LEVEL
  value: {{ .Values.config.logLevel | quote }}
- name: TASKQUEUE_LOG_FORMAT
  value: json
{{- end -}}

{{/* What stored secrets and API keys are kept with. */}}
{{- define "taskqueue.secretKeyEnv" }}
- name: TASKQUEUE_SECRET_KEY
  valueFrom:
    secretKeyRef: {name: {{ include "taskqueue.secretName" . }}, key: secret-key}
{{- end -}}

{{/* The settings of one process. Takes root, component, settings and queues. Workers run the tasks' code, so
     they see no secret that they have no use for. */}}
{{- define "taskqueue.env" -}}
{{- $values := .root.Values }}
{{- include "taskqueue.connectionEnv" .root }}
{{- if ne .component "worker" }}
- name: TASKQUEUE_WEBHOOK_SECRET
  valueFrom:
    secretKeyRef: {name: {{ include "taskqueue.secretName" .root }}, key: webhook-secret}
{{- include "taskqueue.secretKeyEnv" .root }}
{{- end }}
- name: TASKQUEUE_QUEUES
  value: {{ .queues | quote }}
- name: TASKQUEUE_GRACE_SECONDS
  value: {{ .settings.graceSeconds | quote }}
{{- with .settings.concurrency }}
- name: TASKQUEUE_CONCURRENCY
  value: {{ . | quote }}
{{- end }}
{{- with $values.config }}
- name: TASKQUEUE_LEASE_SECONDS
  value: {{ .leaseSeconds | quote }}
- name: TASKQUEUE_RETENTION_DAYS
  value: {{ .retentionDays | quote }}
- name: TASKQUEUE_MAX_BACKLOG
  value: {{ .maxBacklog | int64 | quote }}
- name: TASKQUEUE_SAMPLE_TASKS
  value: {{ .sampleTasks | quote }}
{{- if and .taskMemoryMebibytes (eq $.component "worker") }}
- name: TASKQUEUE_TASK_MEMORY_MEBIBYTES
  value: {{ .taskMemoryMebibytes | int | quote }}
{{- end }}
{{- if eq $.component "api" }}
- name: TASKQUEUE_PUBLIC_DOCS
  value: {{ .publicDocs | quote }}
{{- range $budget, $requests := .rateLimits }}
- name: TASKQUEUE_RATE_LIMIT_{{ upper $budget }}
  value: {{ int64 $requests | quote }}
{{- end }}
{{- end }}
{{- with .taskModules }}
- name: TASKQUEUE_TASK_MODULES
  value: {{ join "," . | quote }}
{{- end }}
{{- end }}
{{- with $values.webhooks }}
- name: TASKQUEUE_WEBHOOK_PAYLOAD
  value: {{ .payload | quote }}
- name: TASKQUEUE_WEBHOOK_ALLOW_PRIVATE
  value: {{ .allowPrivate | quote }}
{{- with concat .allowedOrigins (include "taskqueue.testOrigin" $.root | fromJsonArray) | uniq }}
- name: TASKQUEUE_WEBHOOK_ALLOWED_ORIGINS
  value: {{ join "," . | quote }}
{{- end }}
{{- with .blockedCidrs }}
- name: TASKQUEUE_WEBHOOK_BLOCKED_CIDRS
  value: {{ join "," . | quote }}
{{- end }}
{{- with .schedule }}
- name: TASKQUEUE_WEBHOOK_SCHEDULE
  value: {{ join "," . | quote }}
{{- end }}
{{- end }}
- name: PORT
  value: "8000"
- name: TASKQUEUE_METRICS_PORT
  value: "9100"
{{- with .settings.trustedProxies }}
- name: FORWARDED_ALLOW_IPS
  value: {{ join "," . | quote }}
{{- end }}
{{- with concat $values.extraEnv (default list .settings.extraEnv) }}
{{ tpl (toYaml .) $.root }}
{{- end }}
{{- end -}}

{{/* Where the receiver of `helm test` is, as a JSON array of that origin, or of none. */}}
{{- define "taskqueue.testOrigin" -}}
{{- if eq (include "taskqueue.tested" .) "true" -}}
{{- printf "http://%s-test:8080" (include "taskqueue.fullname" .) | list | toJson -}}
{{- else -}}
[]
{{- end -}}
{{- end -}}

{{/* Whether the release comes with an API key. */}}
{{- define "taskqueue.bootstrapped" -}}
{{- and (eq .Values.config.authMode "api-key") .Values.bootstrapKey.enabled -}}
{{- end -}}

{{/* Whether there is a `helm test`: with API keys it needs one. */}}
{{- define "taskqueue.tested" -}}
{{- and .Values.helmTest.enabled (or (eq .Values.config.authMode "none") .Values.bootstrapKey.enabled) -}}
{{- end -}}

{{/* The bootstrap key, under the name by which it is asked for. Takes root and name. */}}
{{- define "taskqueue.apiKeyEnv" }}
- name: {{ .name }}
  valueFrom:
    secretKeyRef: {name: {{ include "taskqueue.secretName" .root }}, key: api-key}
{{- end -}}
