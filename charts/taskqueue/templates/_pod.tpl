{{/* What every container of ours has in common. Takes root and settings. */}}
{{- define "taskqueue.container" -}}
image: {{ include "taskqueue.image" .root | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- with concat .root.Values.extraEnvFrom (default list .settings.extraEnvFrom) }}
envFrom: {{- tpl (toYaml .) $.root | nindent 2 }}
{{- end }}
securityContext: {{- toYaml .root.Values.containerSecurityContext | nindent 2 }}
volumeMounts:
  - {name: data, mountPath: /var/lib/taskqueue}
  - {name: tmp, mountPath: /tmp}
  {{- with concat .root.Values.extraVolumeMounts (default list .settings.extraVolumeMounts) }}
  {{- tpl (toYaml .) $.root | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* What every pod of ours has in common. Takes root, component and settings. */}}
{{- define "taskqueue.pod" -}}
serviceAccountName: {{ include "taskqueue.serviceAccountName" . }}
automountServiceAccountToken: false
# A Service called taskqueue-metrics would otherwise set TASKQUEUE_METRICS_PORT.
enableServiceLinks: false
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with concat .root.Values.global.imagePullSecrets .root.Values.imagePullSecrets | uniq }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- range $name := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "dnsConfig" }}
{{- with index $.settings $name }}
{{ $name }}: {{- if kindIs "string" . }} {{ . }}{{ else }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- end }}
volumes:
  - {name: data, emptyDir: {}}
  - {name: tmp, emptyDir: {}}
  {{- with concat .root.Values.extraVolumes (default list .settings.extraVolumes) }}
  {{- tpl (toYaml .) $.root | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* The pod template of a process that serves until it is told to stop.
     Takes root, component, pool, settings, queues, and specifics: the rest of its container. */}}
{{- define "taskqueue.podTemplate" -}}
metadata:
  labels:
    {{- include "taskqueue.selector" . | nindent 4 }}
    {{- with .settings.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: {{ .component }}
    # What is generated never changes; what is given may, and is only read at the start.
    checksum/secrets: {{ include "taskqueue.givenSecrets" .root | sha256sum }}
    {{- with .settings.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "taskqueue.pod" . | nindent 2 }}
  topologySpreadConstraints:
    {{- with .settings.topologySpreadConstraints }}
    {{- tpl (toYaml .) $.root | nindent 4 }}
    {{- else }}
    # Rather on different nodes, but rather together than not at all.
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "taskqueue.selector" . | nindent 10 }}
    {{- end }}
  terminationGracePeriodSeconds: {{ add .settings.graceSeconds (default 0 .settings.drainSeconds) 5 }}
  initContainers:
    {{- include "taskqueue.waitForSchema" . | nindent 4 }}
    {{- with .settings.extraInitContainers }}
    {{- tpl (toYaml .) $.root | nindent 4 }}
    {{- end }}
  containers:
    - name: {{ .component }}
      args: [{{ .component }}]
      env: {{- include "taskqueue.env" . | trim | nindent 8 }}
      resources: {{- toYaml .settings.resources | nindent 8 }}
      {{- .specifics | nindent 6 }}
      {{- include "taskqueue.container" . | nindent 6 }}
    {{- with .settings.extraContainers }}
    {{- tpl (toYaml .) $.root | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Nothing of ours starts on tables that are not there yet. Takes root and settings. */}}
{{- define "taskqueue.waitForSchema" -}}
- name: wait-for-schema
  args: [migrate, --check, --patience, "600"]
  env: {{- include "taskqueue.connectionEnv" .root | trim | nindent 4 }}
  resources: {{- toYaml .root.Values.migrate.resources | nindent 4 }}
  {{- include "taskqueue.container" . | nindent 2 }}
{{- end -}}

{{/* Probes that look at files which the process touches: `.beat` while it works, `.wait` while it waits for Redis or
     Postgres. It is ready with the one, and alive with either: nothing comes back because its clients are started
     again. An exec that starts no Python: it runs every few seconds, beside the work. Takes root and component. */}}
{{- define "taskqueue.beatProbes" -}}
{{- $beats := .root.Values.beats -}}
startupProbe:
  exec: {command: {{ include "taskqueue.touched" (list (printf "%s.*" .component) $beats.readySeconds) }}}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 150
readinessProbe:
  exec: {command: {{ include "taskqueue.touched" (list (printf "%s.beat" .component) $beats.readySeconds) }}}
  periodSeconds: 10
  timeoutSeconds: 5
livenessProbe:
  exec: {command: {{ include "taskqueue.touched" (list (printf "%s.*" .component) $beats.aliveSeconds) }}}
  periodSeconds: 30
  timeoutSeconds: 10
{{- end -}}

{{/* Whether a file of such a name was touched in the last seconds. Takes the name and the seconds. */}}
{{- define "taskqueue.touched" -}}
{{- $test := printf "test -n \"$(find /var/lib/taskqueue/run -name '%s' -newermt '-%d seconds')\"" (index . 0) (index . 1 | int) -}}
{{- list "sh" "-c" $test | toJson -}}
{{- end -}}

{{/* Every secret that was given in the values, and the names of those that were not. */}}
{{- define "taskqueue.givenSecrets" -}}
{{- list .Values.secrets .Values.externalRedis .Values.externalDatabase .Values.redis.auth .Values.postgresql.auth | toJson -}}
{{- end -}}

{{/* Nodes are drained some pods of a workload at a time. One that has a single pod must not hold up a drain.
     Takes root, component, pool, settings, name and most: how many pods there may be. */}}
{{- define "taskqueue.disruptionBudget" -}}
{{- if and (gt (int .most) 1) .settings.disruptionBudget }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  labels: {{- include "taskqueue.labels" . | nindent 4 }}
  {{- include "taskqueue.annotations" . }}
spec:
  {{- toYaml .settings.disruptionBudget | nindent 2 }}
  # A pod that does not work anyway may go.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels: {{- include "taskqueue.selector" . | nindent 6 }}
{{- end }}
{{- end -}}
